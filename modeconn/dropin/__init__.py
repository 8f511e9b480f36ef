"""Answers what users of other libraries call: a module for each library.

One line of a script changes: `import modeconn.dropin.loss_landscapes as loss_landscapes`.
"""
