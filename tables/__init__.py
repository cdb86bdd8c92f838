"""The paper's tables as commands, in full and for a laptop; each is run as `python tables/NAME.py`."""
