"""Know, with error bars, whether any of it worked."""
