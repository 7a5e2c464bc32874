"""What attributions of many texts add up to: by part of speech and segment, between runs, and how faithful they are."""
