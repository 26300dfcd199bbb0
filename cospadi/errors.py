"""The errors that ``cospadi`` raises on purpose."""


class CospadiError(Exception):
    """Base of every error that cospadi raises on purpose; its text says what to do."""


class UsageError(CospadiError, ValueError):
    """Something that the user gave is not allowed; the command line exits with code 2."""


class UnavailableError(UsageError):
    """A solver, format or backend cannot run on this machine."""


class NumericalError(CospadiError, ArithmeticError):
    """Non-finite numbers or a factorisation that could not be repaired; names the layer."""


class CheckpointError(CospadiError, ValueError):
    """A file of a checkpoint or work folder is damaged, hostile or of another version."""
