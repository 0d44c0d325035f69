"""What runs over streams share: files, settings as text, progress, going on after a stop."""
