//! Projects: created, changed, listed. What they use is counted from what is
//! there (invariant 7).

use drover_model::{
    api::conductor::{ProjectRef, ProjectView, SetProject},
    project::Project,
};
use drover_rpc::RemoteFailure;
use tracing::info;

use super::{DroverEndpoint, failure::store_failure};

impl DroverEndpoint {
    pub(super) async fn create_project(
        &self,
        project: &Project,
    ) -> Result<ProjectView, RemoteFailure> {
        let mut project = project.clone();
        if project.name.is_empty() {
            project.name = project.id.to_string();
        }
        let created = self.context.store.create_project(&project).await;
        let created = created.map_err(|e| store_failure(&e))?;
        info!(project = %created.id, "project created");
        self.project(created.id.as_str()).await
    }

    pub(super) async fn set_project(&self, ask: &SetProject) -> Result<ProjectView, RemoteFailure> {
        let changed = self.context.store.change_project(&ask.project, &ask.change);
        let changed = changed.await.map_err(|e| store_failure(&e))?;
        info!(project = %changed.id, "project set");
        self.project(changed.id.as_str()).await
    }

    pub(super) async fn get_project(&self, ask: &ProjectRef) -> Result<ProjectView, RemoteFailure> {
        self.project(&ask.project).await
    }

    pub(super) async fn list_projects(&self) -> Result<Vec<ProjectView>, RemoteFailure> {
        let views = self.context.store.project_views().await;
        views.map_err(|e| store_failure(&e))
    }

    async fn project(&self, reference: &str) -> Result<ProjectView, RemoteFailure> {
        let view = self.context.store.project_view(reference).await;
        view.map_err(|e| store_failure(&e))
    }
}
