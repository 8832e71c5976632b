"""A trained model behind HTTP.

`engine` computes, `answering` reads inputs and writes answers, `http` speaks, `measures` counts, `command` runs it all.
"""
