"""The one error type that a user can cause."""


class ResPruneError(Exception):
    """Something the user can put right; its text is one sentence that says how. The CLI exits with 2."""
