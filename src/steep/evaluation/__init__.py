"""What training taught and what it cost: bits per byte and perplexity by domain, base against trained."""
