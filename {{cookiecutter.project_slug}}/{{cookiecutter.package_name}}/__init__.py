"""{{ cookiecutter.project_name }}: data.py, model.py and network.py are the research; engine/ is the plumbing."""
