"""The methods, one folder a family, one file a method."""
