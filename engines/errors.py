"""The errors that users see: one line each, with the exit status of the command line."""

from __future__ import annotations


class PPLLaVAError(Exception):
    """An input or option from the user can't be used.

    The message is one line: what is wrong, where, and what to do. Commands print it without a traceback.

    Attributes:
        exit_status: The exit status of the command.
    """

    exit_status = 2


class BundleError(PPLLaVAError):
    """A bundle can't be opened: damaged, incomplete, too new, or not a bundle."""


class MediaError(PPLLaVAError):
    """A video or an image can't be used."""


class PromptError(PPLLaVAError):
    """A question can't be asked: empty, or too long for the model's context."""


class EngineError(PPLLaVAError):
    """No engine can run this bundle on this machine."""


class BusyError(PPLLaVAError):
    """The queue of questions is full, or no slot became free in time: try again later."""
