"""The models the agent knows, and how one is put to work."""
