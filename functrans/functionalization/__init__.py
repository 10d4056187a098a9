"""Writes and views made pure, at the door: interpreters, rules and traces see neither."""
