"""The errors that people see: one clear line each, and the exit status of the command line."""

from __future__ import annotations


class PPLLaVAError(Exception):
    """Something the user gave can't be used. The message is one line: what is wrong, where, and what to do.

    Command lines print it without a traceback and exit with exit_status.
    """

    exit_status = 2


class BundleError(PPLLaVAError):
    """A bundle can't be opened: damaged, incomplete, too new, or not a bundle."""


class MediaError(PPLLaVAError):
    """A video or an image can't be used."""


class PromptError(PPLLaVAError):
    """A question can't be asked: empty, or too long for the model's context."""


class EngineError(PPLLaVAError):
    """No engine can run this bundle here."""


class BusyError(PPLLaVAError):
    """Too many questions wait already, or a place didn't come in time: try again later."""
