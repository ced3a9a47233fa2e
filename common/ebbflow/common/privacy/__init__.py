"""The privacy mechanism: noise, accounting, the layout of a report, and what makes a plan or a batch acceptable."""
