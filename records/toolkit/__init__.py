"""The tools behind `python records/tools.py VERB`: one module per verb, and what several of them
share."""
