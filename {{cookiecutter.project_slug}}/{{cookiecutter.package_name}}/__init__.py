"""data.py, model.py and network.py are the research, and yours to replace; engine/ is the plumbing."""
