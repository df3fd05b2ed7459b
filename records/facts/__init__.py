"""What toolkit and forge know in common: limits, files, statistics, logs, record folders and
wrapped scripts.

limits      the numbers of the competition
files       files written whole or not at all, strangers' files read with bounds
statistics  tests, intervals and the numbers of seeds that they need
wrappers    the script inside a compressed script, opened as data
logs        the facts of a training log
folder      the facts of a record folder

Nothing here imports toolkit or forge, and nothing that is read is ever executed.
"""
