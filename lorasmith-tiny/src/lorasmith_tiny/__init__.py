"""The built-in model of Lorasmith and its example pictures, as files: `models/` and `input/` of a base folder.

The first number of the version changes when older or newer versions of Lorasmith cannot use the files.
"""

__version__ = "1.1.0"
