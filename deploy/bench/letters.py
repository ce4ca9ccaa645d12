"""What the scripted engine says and the load reads: the letter of a token tells its step."""

import string

LETTERS = string.ascii_letters + string.digits
