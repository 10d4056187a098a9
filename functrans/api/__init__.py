"""What a user calls: the public functions, and the checks of what they are given."""
