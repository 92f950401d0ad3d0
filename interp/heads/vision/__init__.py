"""What heads see of a picture: its sinks, its objects, where on it they look."""
