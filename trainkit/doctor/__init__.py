"""What is wrong with a data set, before anything is trained: every image is looked at, and each finding says what it
does to training and which command puts it right.

`look` reads the images as a training run does, `checks` is the table of what is looked for, `page` is the contact sheet
and `text` the summary on the terminal.
"""
