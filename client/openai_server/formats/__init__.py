"""The ways in which model families write thoughts and calls of functions, as data.

choice.py --> parser.py, channels.py, python_values.py --> answer.py  (text becomes events)
    |             |
    |         table.py
    |             |
    +-------> call_grammar.py --> grammar.py  (what a request demands becomes a grammar)
"""
