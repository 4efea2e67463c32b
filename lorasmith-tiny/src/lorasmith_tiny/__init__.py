"""The built-in model of Lorasmith and its example pictures, as files: `models/` and `input/` of a base folder."""
