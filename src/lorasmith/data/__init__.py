"""Images and captions to encoded samples."""
