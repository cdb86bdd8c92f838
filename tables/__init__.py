"""The paper's tables: `make.py` plans their rows as commands, runs or submits them, and writes the results."""
