"""The diagnostic CLI; `app.py` lists its commands."""
