def next_hypothesis(c):
    return None
