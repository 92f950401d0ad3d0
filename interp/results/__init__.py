"""What methods and evaluations give: head sets, head scores with intervals, evaluations."""
