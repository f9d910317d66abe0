"""What training costs: each file is a command of its own."""
