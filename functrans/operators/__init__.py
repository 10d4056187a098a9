"""What is known of an operator: its facts, and the tables of rules."""
