"""The code behind the notebooks: each chapter imports the techniques that earlier chapters derived."""

from helpers.libraries.quiet import silence_warnings

silence_warnings()  # here, because some libraries warn as soon as they are imported
