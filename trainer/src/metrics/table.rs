//! Plain-text tables with aligned columns, for terminals and logs.

use std::fmt;

/// Where the cells of a column stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Flush left, for words.
    Left,
    /// Flush right, for numbers.
    Right,
}

/// A table with a heading, printed by its [`Display`](fmt::Display).
///
/// Columns are as wide as their widest cell and stand two spaces apart; a rule separates the
/// heading. Line breaks and control characters inside a cell are printed escaped, so that a cell
/// cannot break the table. Lines have no trailing spaces, and the last one has no line break.
#[derive(Debug, Clone)]
pub struct Table {
    heading: Vec<String>,
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these columns.
    pub fn new(columns: &[(&str, Align)]) -> Self {
        Self {
            heading: columns.iter().map(|(name, _)| (*name).to_owned()).collect(),
            align: columns.iter().map(|(_, align)| *align).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row. Cells past the last column are dropped and missing ones are left empty.
    pub fn row<I>(&mut self, cells: I) -> &mut Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        let mut row: Vec<String> = cells
            .into_iter()
            .map(|cell| printable(&cell.into()))
            .collect();
        row.resize(self.heading.len(), String::new());
        self.rows.push(row);
        self
    }

    /// Names of the columns.
    pub fn heading(&self) -> &[String] {
        &self.heading
    }

    /// Alignment of the columns.
    pub fn align(&self) -> &[Align] {
        &self.align
    }

    /// Rows of cells, each as long as the heading.
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    fn line(&self, cells: &[String], widths: &[usize]) -> String {
        let mut line = String::new();
        for (index, cell) in cells.iter().enumerate() {
            if index > 0 {
                line.push_str("  ");
            }
            let padding = " ".repeat(widths[index].saturating_sub(cell.chars().count()));
            match self.align[index] {
                Align::Left => line.extend([cell.as_str(), &padding]),
                Align::Right => line.extend([padding.as_str(), cell]),
            }
        }
        line.truncate(line.trim_end().len());
        line
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<usize> = (0..self.heading.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| &row[column]);
                cells
                    .chain([&self.heading[column]])
                    .map(|c| c.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        write!(
            f,
            "{}\n{}",
            self.line(&self.heading, &widths),
            rule.join("  ")
        )?;
        for row in &self.rows {
            write!(f, "\n{}", self.line(row, &widths))?;
        }
        Ok(())
    }
}

/// The text with control characters escaped.
fn printable(text: &str) -> String {
    text.chars().fold(
        String::with_capacity(text.len()),
        |mut printable, character| {
            if character.is_control() {
                printable.extend(character.escape_default());
            } else {
                printable.push(character);
            }
            printable
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("stage", Align::Left), ("steps", Align::Right)]);
        table.row(["4k", "1,200"]).row(["long-context", "8"]);
        assert_eq!(
            table.to_string(),
            "stage         steps\n\
             ------------  -----\n\
             4k            1,200\n\
             long-context      8"
        );
    }

    #[test]
    fn odd_rows_and_hostile_cells_keep_the_shape() {
        let mut table = Table::new(&[("a", Align::Left), ("b", Align::Left)]);
        table.row(["é\n\u{1b}[2J"]).row(["1", "2", "3"]);
        assert_eq!(
            table.to_string(),
            "a             b\n------------  -\né\\n\\u{1b}[2J\n1             2"
        );
        assert_eq!(table.rows()[1], ["1", "2"]);
    }

    #[test]
    fn an_empty_table_is_its_heading() {
        let table = Table::new(&[("only", Align::Right)]);
        assert_eq!(table.to_string(), "only\n----");
    }
}
