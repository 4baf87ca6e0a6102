"""Models of other systems as models of this library, one module for each system."""
