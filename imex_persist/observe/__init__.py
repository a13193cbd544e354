"""Looking inside: the kernel's trace, what it means, and its pictures. Imports runtime, never the other way round."""
