"""The engine of the commands that visit a corpus."""
