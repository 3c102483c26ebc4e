"""data.py, model.py and network.py are the research, yours to replace; engine/ is the plumbing."""
