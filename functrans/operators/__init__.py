"""What is known of an operator (``info``), and the tables of rules."""
