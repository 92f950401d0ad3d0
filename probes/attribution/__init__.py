"""Why a head attends, and which heads feed which: scores and weights split over upstream parts."""
