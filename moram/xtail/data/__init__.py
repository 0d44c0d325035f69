"""Image domains: what they hold, where they come from, and how they are read."""
