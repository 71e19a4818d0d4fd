//! Projects: what was created, what their instances use, and what of their
//! quota is promised to transfers under way (invariant 7). An instance counts
//! once: as a claim until it is handed over, as the project's own from then on.

use std::collections::BTreeMap;

use drover_model::{
    api::conductor::{ProjectChange, ProjectView},
    ids::{InstanceId, MigrationId, ProjectId},
    migration::Migration,
    project::{Project, ProjectUsage, QuotaShortfall},
};
use sqlx::{Row, any::AnyRow};

use crate::{
    Result, Store, StoreError, claims, database::Tx, from_json, instances, instances::shown,
    migrations::Lease, signed, to_json, unsigned,
};

/// What a project has, and what it is promised.
#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    usage: ProjectUsage,
    promised: ProjectUsage,
}

impl Totals {
    fn view(self, project: Project, created: bool) -> ProjectView {
        ProjectView {
            project,
            created,
            usage: self.usage,
            promised: self.promised,
        }
    }
}

impl Store {
    /// Puts a new project on the record.
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it cannot be, [`StoreError::Exists`] if its id
    /// is taken, or the database failed.
    pub async fn create_project(&self, project: &Project) -> Result<Project> {
        hold_to_rules(project)?;
        let record = to_json("a project", project)?;
        let statement = || {
            sqlx::query(
                "INSERT INTO projects (id, name, claim_serial, record) VALUES ($1, $2, 0, $3) \
                 ON CONFLICT (id) DO NOTHING",
            )
            .bind(project.id.to_string())
            .bind(project.name.clone())
            .bind(record.clone())
        };
        match self.execute(statement).await? {
            0 => Err(StoreError::Exists(named(project.id.as_str()))),
            _ => Ok(project.clone()),
        }
    }

    /// Changes a project; `reference` as for [`Store::find_project`].
    ///
    /// # Errors
    /// [`StoreError::Invalid`] if it cannot become that (nothing is written
    /// then), [`StoreError::NotFound`], [`StoreError::Ambiguous`], or the
    /// database failed.
    pub async fn change_project(&self, reference: &str, change: &ProjectChange) -> Result<Project> {
        self.attempt(|| self.try_change_project(reference, change))
            .await
    }

    async fn try_change_project(&self, reference: &str, change: &ProjectChange) -> Result<Project> {
        let mut tx = self.begin().await?;
        let id = find(&mut tx, reference).await?.id;
        let changed = change.applied(&lock(&mut tx, &id).await?);
        hold_to_rules(&changed)?;
        sqlx::query("UPDATE projects SET name = $2, record = $3 WHERE id = $1")
            .bind(id.as_str())
            .bind(&changed.name)
            .bind(to_json("a project", &changed)?)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(changed)
    }

    /// The project of an id, or of a unique name.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], or the database failed.
    pub async fn find_project(&self, reference: &str) -> Result<Project> {
        let work = async {
            let mut tx = self.begin_reading().await?;
            find(&mut tx, reference).await
        };
        self.steady(work).await
    }

    /// A project with what it has and is promised. One that was never created
    /// is found by its id, if instances name it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], or the database failed.
    pub async fn project_view(&self, reference: &str) -> Result<ProjectView> {
        self.steady(self.project_view_inner(reference)).await
    }

    async fn project_view_inner(&self, reference: &str) -> Result<ProjectView> {
        let mut tx = self.begin_reading().await?;
        let (project, created) = match (find(&mut tx, reference).await, reference.parse()) {
            (Ok(project), _) => (project, true),
            (Err(StoreError::NotFound(_)), Ok(id)) => (Project::new(id), false),
            (Err(error), _) => return Err(error),
        };
        let mut all = totals(&mut tx, Some(&project.id), None).await?;
        match all.remove(project.id.as_str()) {
            None if !created => Err(StoreError::NotFound(named(reference))),
            totals => Ok(totals.unwrap_or_default().view(project, created)),
        }
    }

    /// Every project, by id, those included that only instances name.
    ///
    /// # Errors
    /// The database failed.
    pub async fn project_views(&self) -> Result<Vec<ProjectView>> {
        self.steady(self.project_views_inner()).await
    }

    async fn project_views_inner(&self) -> Result<Vec<ProjectView>> {
        let mut tx = self.begin_reading().await?;
        let rows = sqlx::query("SELECT record FROM projects")
            .fetch_all(&mut *tx)
            .await?;
        let mut totals = totals(&mut tx, None, None).await?;
        let mut views = BTreeMap::new();
        for row in &rows {
            let project = project(row)?;
            let of_it = totals.remove(project.id.as_str()).unwrap_or_default();
            views.insert(project.id.clone(), of_it.view(project, true));
        }
        for (id, of_it) in totals {
            // Metadata of a domain may name what can be no project; nobody can
            // ask for that.
            if let Ok(id) = id.parse::<ProjectId>() {
                views.insert(id.clone(), of_it.view(Project::new(id), false));
            }
        }
        Ok(views.into_values().collect())
    }

    /// Promises quota of a project to a migration, or says what is missing. A
    /// claim that is there already is replaced, so asking twice claims once.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is no such project, [`StoreError::Fenced`], or
    /// the database failed.
    pub async fn claim_quota(
        &self,
        lease: Lease,
        project: &ProjectId,
        wanted: ProjectUsage,
    ) -> Result<std::result::Result<(), Vec<QuotaShortfall>>> {
        self.attempt(|| self.try_claim_quota(lease, project, wanted))
            .await
    }

    async fn try_claim_quota(
        &self,
        lease: Lease,
        project: &ProjectId,
        wanted: ProjectUsage,
    ) -> Result<std::result::Result<(), Vec<QuotaShortfall>>> {
        let migration = lease.migration;
        let mut tx = self.begin_under(lease).await?;
        let quota = lock(&mut tx, project).await?.quota;
        let mut all = totals(&mut tx, Some(project), Some(migration)).await?;
        let Totals { usage, promised } = all.remove(project.as_str()).unwrap_or_default();
        let short = quota.shortfalls(&usage.plus(promised), &wanted);
        if !short.is_empty() {
            return Ok(Err(short));
        }
        release(&mut tx, migration).await?;
        insert(&mut tx, migration, project, wanted).await?;
        tx.commit().await?;
        Ok(Ok(()))
    }

    /// Gives a claim of quota back. One that is gone already is no error.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], or the database failed.
    pub async fn release_quota(&self, lease: Lease) -> Result<()> {
        self.attempt(|| async {
            let mut tx = self.begin_under(lease).await?;
            release(&mut tx, lease.migration).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// Records that the instance is the project's, under a new name if there is
    /// one, and turns the claim into the project's own use, in one commit.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], or the database failed.
    pub async fn hand_over(
        &self,
        lease: Lease,
        instance: InstanceId,
        project: &ProjectId,
        name: Option<&str>,
        now_ms: u64,
    ) -> Result<()> {
        self.attempt(|| async {
            let mut tx = self.begin_under(lease).await?;
            instances::handed_over(&mut tx, instance, project, name, now_ms).await?;
            release(&mut tx, lease.migration).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// The same long after, for a transfer that went by without it: only if nobody
    /// has moved the instance or given it away since. What is claimed is given back.
    ///
    /// # Errors
    /// The database failed.
    pub async fn hand_over_late(
        &self,
        transfer: &Migration,
        project: &ProjectId,
        name: Option<&str>,
        now_ms: u64,
    ) -> Result<()> {
        let (uuid, id) = (transfer.uuid, transfer.instance_uuid);
        self.attempt(|| async {
            let mut tx = self.begin().await?;
            if claims::is_still_on(&mut tx, transfer, &transfer.source_host).await? {
                instances::handed_over(&mut tx, id, project, name, now_ms).await?;
            }
            release(&mut tx, uuid).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// Migrations that hold a claim of quota.
    ///
    /// # Errors
    /// The database failed.
    pub async fn quota_claims(&self) -> Result<Vec<(String, ProjectUsage)>> {
        let query = sqlx::query("SELECT * FROM quota_claims ORDER BY migration_uuid");
        let rows = self.steady(query.fetch_all(&self.database)).await?;
        rows.iter()
            .map(|row| Ok((row.try_get("migration_uuid")?, amounts(row)?)))
            .collect()
    }
}

fn hold_to_rules(project: &Project) -> Result<()> {
    let problems = project.problems();
    if problems.is_empty() {
        return Ok(());
    }
    Err(StoreError::Invalid(problems.join("; ")))
}

fn named(reference: &str) -> String {
    format!("project '{}'", shown(reference))
}

async fn find(tx: &mut Tx, reference: &str) -> Result<Project> {
    let rows = sqlx::query(
        "SELECT record FROM projects WHERE id = $1 OR name = $1 \
         ORDER BY CASE WHEN id = $1 THEN 0 ELSE 1 END, id LIMIT 2",
    )
    .bind(reference)
    .fetch_all(&mut **tx)
    .await?;
    let found = rows.iter().map(project).collect::<Result<Vec<_>>>()?;
    match found.as_slice() {
        [] => Err(StoreError::NotFound(named(reference))),
        [one] => Ok(one.clone()),
        [one, ..] if one.id.as_str() == reference => Ok(one.clone()),
        [one, other, ..] => Err(StoreError::Ambiguous(format!(
            "'{}' is the name of several projects, among them {} and {}; say which by id",
            shown(reference),
            one.id,
            other.id
        ))),
    }
}

/// Takes the lock of those who claim quota of a project or change it.
async fn lock(tx: &mut Tx, id: &ProjectId) -> Result<Project> {
    let row = sqlx::query(
        "UPDATE projects SET claim_serial = claim_serial + 1 WHERE id = $1 RETURNING record",
    )
    .bind(id.as_str())
    .fetch_optional(&mut **tx)
    .await?;
    project(&row.ok_or_else(|| StoreError::NotFound(named(id.as_str())))?)
}

/// What projects (or one) have and are promised by other migrations than
/// `except`, by id. One statement, so that an instance that is handed over
/// meanwhile is seen either on its way or there.
async fn totals(
    tx: &mut Tx,
    project: Option<&ProjectId>,
    except: Option<MigrationId>,
) -> Result<BTreeMap<String, Totals>> {
    let rows = sqlx::query(
        "SELECT project_id, promised, CAST(SUM(instances) AS BIGINT) AS instances, \
         CAST(SUM(vcpus) AS BIGINT) AS vcpus, CAST(SUM(memory_mb) AS BIGINT) AS memory_mb, \
         CAST(SUM(disk_bytes) AS BIGINT) AS disk_bytes FROM (\
         SELECT project_id, CAST(0 AS BIGINT) AS promised, CAST(1 AS BIGINT) AS instances, \
         vcpus, memory_mib AS memory_mb, disk_bytes FROM instances \
         UNION ALL SELECT project_id, CAST(1 AS BIGINT), instances, vcpus, memory_mb, disk_bytes \
         FROM quota_claims WHERE migration_uuid <> $2) AS parts \
         WHERE CAST($1 AS TEXT) IS NULL OR project_id = $1 GROUP BY project_id, promised",
    )
    .bind(project.map(ProjectId::as_str))
    .bind(except.map_or_else(String::new, |m| m.to_string()))
    .fetch_all(&mut **tx)
    .await?;
    let mut all = BTreeMap::<String, Totals>::new();
    for row in &rows {
        let of_it = all.entry(row.try_get("project_id")?).or_default();
        match row.try_get::<i64, _>("promised")? {
            0 => of_it.usage = amounts(row)?,
            _ => of_it.promised = amounts(row)?,
        }
    }
    Ok(all)
}

async fn insert(
    tx: &mut Tx,
    migration: MigrationId,
    project: &ProjectId,
    wanted: ProjectUsage,
) -> Result<()> {
    sqlx::query(
        "INSERT INTO quota_claims (migration_uuid, project_id, instances, vcpus, memory_mb, \
         disk_bytes) VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(migration.to_string())
    .bind(project.as_str())
    .bind(signed(wanted.instances))
    .bind(signed(wanted.vcpus))
    .bind(signed(wanted.memory_mb))
    .bind(signed(wanted.disk_bytes))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn release(tx: &mut Tx, migration: MigrationId) -> Result<()> {
    sqlx::query("DELETE FROM quota_claims WHERE migration_uuid = $1")
        .bind(migration.to_string())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

fn project(row: &AnyRow) -> Result<Project> {
    from_json("a project", row.try_get("record")?)
}

fn amounts(row: &AnyRow) -> Result<ProjectUsage> {
    Ok(ProjectUsage {
        instances: unsigned(row.try_get("instances")?),
        vcpus: unsigned(row.try_get("vcpus")?),
        memory_mb: unsigned(row.try_get("memory_mb")?),
        disk_bytes: unsigned(row.try_get("disk_bytes")?),
    })
}
