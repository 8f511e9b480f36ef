"""What other libraries' users call, answered by this one: a module for each library.

`import modeconn.dropin.loss_landscapes as loss_landscapes` is the one line that changes in a script.
"""
