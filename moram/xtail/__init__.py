"""X-TAIL: CLIP learns image domains one after the other and is tested on all their classes."""
