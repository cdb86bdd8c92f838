"""Programs that prepare data, look at it, and start trainings; each is run as `python scripts/NAME.py`."""
