"""g++ at -O1: a mutant runs a few hundred times at most, and most of its time is its compilation. hostcc's `cxx`."""

import os
import sys

os.execvp("g++", ["g++", *("-O1" if argument == "-O3" else argument for argument in sys.argv[1:])])
