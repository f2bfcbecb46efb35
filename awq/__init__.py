"""From imatrix statistics to importances and scales. Imports formats only."""
