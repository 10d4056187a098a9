"""What a wrapper looks like to code: its metadata, its text, its place in pytrees."""
