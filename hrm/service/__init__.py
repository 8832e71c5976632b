"""A trained model behind HTTP.

`engine` computes, `answering` reads inputs and writes answers, `http` speaks, `messages` is what it takes and gives,
`problems` how it refuses, `room` how many puzzles it takes on, `connection` bounds what clients hold open, `page` is
what a browser shows, `measures` counts, `command` runs it all.
`modules` updates the states of `sessions`, which live in a `memory`.
"""
