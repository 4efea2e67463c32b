"""Questions of the server, answered in the assistant process: each module registers functions with `@question`."""
