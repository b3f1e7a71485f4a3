"""What a run needs and takes, worked out from shapes, settings and a card; `steep.plan` puts it together."""
