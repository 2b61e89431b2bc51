"""Data formats: functions from a row to a `Conversation`; `FORMATS` in `registry.py` lists them."""
