"""The Forge: autonomous experimentation with train_gpt.py. Entry point: python
records/forge/forge.py VERB."""


class ForgeError(Exception):
    """A mistake of the user or a state that forbids the work: printed as one line, exit code 2,
    never a traceback."""
