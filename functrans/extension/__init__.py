"""What ``functrans.extend`` offers: a transform by a table, levels that look on, operations that visit every level."""
